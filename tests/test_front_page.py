"The page of a front, in a browser: no error, the mouse on a member names it, and it is ringed in all panels."
import json
import shutil
import subprocess

import pandas as pd
import pytest

from moevo_nb.pareto import front_page

browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
watch = "<script>window.errors = []; window.addEventListener('error', e => window.errors.push(String(e.message)));</script>"
hover = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const page = document.getElementById("front"), full = page._fullLayout, point = page._fullData[0];
  const drag = page.querySelector('.nsewdrag[data-subplot="xy"]'), box = drag.getBoundingClientRect();
  const at = {clientX: box.left + full.xaxis.l2p(point.x[1]), clientY: box.top + full.yaxis.l2p(point.y[1]), bubbles: true};
  drag.dispatchEvent(new MouseEvent("mousemove", at));
  setTimeout(() => {
    const rings = [1, 3, 5].map(k => [...page.data[k].x, ...page.data[k].y]);
    const found = {errors: window.errors, said: page.querySelector(".hoverlayer").textContent, rings: rings};
    const told = document.createElement("pre");
    told.id = "found";
    told.textContent = JSON.stringify(found);
    document.body.appendChild(told);
  }, 500);
}, 500));
</script>"""


@pytest.mark.skipif(browser is None, reason="no Chromium is installed (Debian's package chromium), so the page is not opened")
def test_the_mouse_on_a_member_names_it_and_rings_it_in_all_panels(tmp_path):
    table = pd.DataFrame(dict(accuracy=[0.5, 0.7, 0.8], active_fraction=[0.01, 0.1, 0.3], auroc=[0.5, 0.8, 0.7]))
    page = front_page(table, {"knee": 1}, dict(accuracy=0.8, active_fraction=1.0, auroc=0.6), "A front")
    page = page.replace("<head>", "<head>" + watch, 1).replace("</body>", hover + "</body>")
    (tmp_path / "front.html").write_text(page)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000", "--virtual-time-budget=5000",
               "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'front.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout.split('<pre id="found">')[1].split("</pre>")[0])
    assert found["errors"] == [] and "CONSOLE" not in done.stderr
    assert "member 1" in found["said"] and "knee" in found["said"] and "70.0 %" in found["said"]
    assert found["rings"][0][1] == 70 and found["rings"][1][1] == 0.8 and found["rings"][2] == [70, 0.8]
    assert found["rings"][0][0] == found["rings"][1][0]   # the same size, in both panels that show it

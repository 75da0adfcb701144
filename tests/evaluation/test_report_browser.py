"""The report in a real browser: everything is drawn, nothing complains, nothing is fetched."""

import json
import re
import subprocess

import pytest

from refractor_core.evaluation.report import build_report
from tests.components import require
from tests.evaluation.runs import run_directory

PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const box = element => element.getBoundingClientRect();
  const shown = [...document.querySelectorAll("figure svg")].filter(svg => box(svg).width > 0);
  const found = {
    figures: document.querySelectorAll("figure").length,
    sizes: shown.map(svg => [Math.round(box(svg).width), Math.round(box(svg).height)]),
    ink: shown.map(svg => [...svg.querySelectorAll("path, rect, image, use")].filter(e => box(e).width + box(e).height > 0).length),
    labels: shown.every(svg => svg.getAttribute("aria-label").length > 20),
    colour: getComputedStyle(shown[0].querySelector("text")).fill,
    page: getComputedStyle(document.body).backgroundColor,
    overflow: document.documentElement.scrollWidth - innerWidth,
    fetched: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}, 50));
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return build_report(run_directory(tmp_path_factory.mktemp("run") / "run", steps=60, skipped=(5,)))


def browse(page, profile, *flags):
    """The page's DOM after loading, and what the browser's console said."""
    command = [require("chromium", apt="chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", *flags, "--dump-dom", page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def probed(report, tmp_path, *flags, text=None):
    """What the probe saw. The copy that it runs in may run scripts; it is otherwise the report."""
    page = tmp_path / "probed.html"
    content = text or report.read_text()
    allowed = content.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert allowed != content
    page.write_text(allowed.replace("</body>", PROBE + "</body>"))
    dom, console = browse(page, tmp_path / "profile", *flags)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    assert found, "the page did not finish loading"
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")), console


@pytest.mark.browser
def test_a_browser_draws_everything_and_fetches_nothing(report, tmp_path):
    seen, console = probed(report, tmp_path, "--window-size=1240,1000")
    assert seen["figures"] == 10 and len(seen["sizes"]) == 10
    assert all(width > 300 and height > 80 for width, height in seen["sizes"])
    assert all(count > 5 for count in seen["ink"])
    assert seen["labels"] and seen["overflow"] <= 0
    assert seen["fetched"] == [] and console == []


@pytest.mark.browser
def test_dark_and_light_differ_and_the_drawings_follow(report, tmp_path):
    light, _ = probed(report, tmp_path, "--window-size=1240,1000")
    dark, _ = probed(report, tmp_path, "--window-size=1240,1000", "--blink-settings=preferredColorScheme=0")
    assert light["page"] != dark["page"] and light["colour"] != dark["colour"]


@pytest.mark.browser
def test_a_phone_has_no_sideways_scrolling(report, tmp_path):
    seen, _ = probed(report, tmp_path, "--window-size=500,900")
    assert seen["overflow"] <= 0 and len(seen["sizes"]) == 10
    assert all(width > 300 for width, _ in seen["sizes"])


@pytest.mark.browser
def test_the_probe_sees_a_request_and_a_console_error(report, tmp_path):
    """Planted faults: a picture from elsewhere, which the page's own policy refuses, is heard of."""
    planted = report.read_text().replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt="x"></main>')
    seen, console = probed(report, tmp_path, text=planted)
    assert seen["fetched"] or console

"""The report: what it says, and how it behaves in a browser."""

import base64
import html.parser
import json
import re
import shutil
import subprocess
import urllib.parse

import pytest

from firmly.lab.report import render, write_report
from firmly.lab.run_folder import RunFolder

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)

PROBE = """
<script>
window.addEventListener('load', () => {
  const images = [...document.images];
  const wide = [...document.querySelectorAll('main *')].filter(e => {
    if (e.closest('.scroll, pre, details:not([open])') || getComputedStyle(e).display === 'none') return false;
    const box = e.getBoundingClientRect();
    return box.width > 0 && box.right > document.documentElement.clientWidth + 0.5;
  }).map(e => e.tagName + '.' + (e.getAttribute('class') || '') + ': ' + (e.textContent || '').slice(0, 30));
  document.title = JSON.stringify({
    width: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth,
    images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).length, wide,
  });
});
</script></head>"""


class Page(html.parser.HTMLParser):
    VOID = {"meta", "link", "img", "br", "circle", "line", "rect", "polyline"}

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.sources, self.alternatives = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.sources.append(values["src"])
            self.alternatives.append(values["alt"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "style" not in self.open:
            self.texts.append(data.strip())


def page_of(run):
    page = Page()
    page.feed((run / "report.html").read_text())
    assert page.open == []
    return page


def test_the_report_is_self_contained_and_small(finished_run):
    run, _ = finished_run
    text = (run / "report.html").read_text()
    assert len(text.encode()) < 1_000_000
    without_licences = re.sub(r"data:[^\"]*", "", text)
    assert "http" not in without_licences and "<script" not in text and "url(" not in text
    page = page_of(run)
    assert len(page.sources) >= 14 and all(page.alternatives)
    assert all(base64.b64decode(s.partition(",")[2])[:4] == b"\x89PNG" for s in page.sources)


def test_the_report_says_what_was_promised(finished_run):
    run, results = finished_run
    text = " ".join(page_of(run).texts)
    for heading in (
        "What one sees", "How good the images are", "How stable the network is", "The worst perturbation found",
        "What stability costs", "How it was trained", "What the certificate assumes", "How to check it yourself",
    ):  # fmt: skip
        assert heading in text
    for method in results["methods"]:
        assert method["name"] in text and f"{method['psnr']:.2f}" in text and f"{method['ssim']:.4f}" in text
    for sentence in results["certificate"]["assumptions"]:
        assert sentence in text
    assert f"firmly verify {run.path.name}/certificate.safetensors {run.path.name}" in text


def test_the_report_is_made_from_the_folder_alone(finished_run, tmp_path):
    run, _ = finished_run
    copy = RunFolder(shutil.copytree(run.path, tmp_path / run.path.name))
    (copy / "report.html").unlink()
    write_report(copy)
    assert (copy / "report.html").read_text() == (run / "report.html").read_text()


def test_a_run_without_a_certificate_and_without_a_twin_has_a_report_too(finished_run, tmp_path):
    run, _ = finished_run
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "bare"))
    results = copy.read_json("results.json")
    results.update(certificate=None, twin=None, budgets=[])
    results["methods"] = [m | {"worst_case": None} for m in results["methods"] if m["key"] not in ("twin", "wiener")]
    results["attack"].pop("twin")
    copy.write_json("results.json", results)
    text = render(copy)
    assert "No finite bound is known" in text and "How to check it yourself" not in text


def test_names_are_escaped(finished_run, tmp_path):
    run, _ = finished_run
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "escaped"))
    results = copy.read_json("results.json")
    results["methods"][0]["name"] = "<script>alert(1)</script>"
    copy.write_json("results.json", results)
    assert "<script>alert" not in render(copy)


@pytest.mark.parametrize("width", [500, 1100])
def test_the_report_in_a_browser(finished_run, tmp_path, width):
    """No console errors, all pictures shown, nothing wider than the page. 375 px are shown in a frame of that width:
    a browser window cannot be made narrower than 500 px."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    run, _ = finished_run
    report = tmp_path / "report.html"
    report.write_text((run / "report.html").read_text().replace("</head>", PROBE))
    shown = report
    if width == 500:
        shown = tmp_path / "phone.html"
        script = "document.title = frames[0].document.title"
        shown.write_text(
            f'<iframe src="report.html" width="375" height="800" style="border:0"></iframe>'
            f"<script>window.onload = () => setTimeout(() => {{ {script} }}, 300)</script>"
        )
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
        "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=4000",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", shown.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stdout[:500] + done.stderr[-500:]
    found = json.loads(html.unescape(urllib.parse.unquote(title[1])))
    assert found["width"] == (375 if width == 500 else 1100)
    assert found["scroll"] <= found["width"] and found["wide"] == []
    assert found["images"] >= 14 and found["broken"] == 0

"""The report's pages in Chromium, from disk, with the network off: the knob turns, the sound goes on, a cell of the
matrix tells its sentence, nothing is fetched."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver installed")

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --autoplay-policy=no-user-gesture-required "
    "--host-resolver-rules=MAP|*|~NOTFOUND"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of the report of EQKNOBS_RESULTS where that is set, else of random scores and tones."""
    given = os.environ.get("EQKNOBS_RESULTS")
    if given:
        return Path(given).resolve() / "report"
    from helpers.results_fixture import make_report, make_results, make_tables

    root = tmp_path_factory.mktemp("browser")
    config = make_results(root)
    run = root / "results" / "run"
    make_tables(run, config)
    make_report(run, config, run / "report")
    return run / "report"


@pytest.fixture
def browser(report):
    """Chromium as a phone of 390 px on the page of players; afterwards no console error and no request may have been
    made, by whatever page the test opened."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tempfile.mkdtemp(prefix="chromium-")
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag.replace("|", " "))
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 2}}
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
        )
        page = report / "steering.html"
        driver.get(page.as_uri())
        yield driver
        assert [line for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []
        asked = []
        for entry in driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
        assert page.as_uri() in asked  # the log works
        assert [url for url in asked if not url.startswith(("file://", "blob:", "data:", "chrome:", "about:"))] == []
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


def until(driver, script: str, what: str, seconds: float = 15.0):
    """Wait until a script's value is true; returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = driver.execute_script(script)
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


def state(driver) -> dict:
    return driver.execute_script(
        "const a = document.querySelector('.player audio');"
        "return {src: a.src, time: a.currentTime, paused: a.paused, duration: a.duration, error: a.error}"
    )


def turn(driver, stop: int) -> None:
    driver.execute_script(
        "const s = document.querySelector('.player .alpha-slider'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input', {bubbles: true}))",
        stop,
    )


def test_turning_the_knob_switches_the_sound_in_place(browser):
    until(browser, "return document.querySelector('.player audio').readyState >= 1", "sound loads")
    browser.execute_script(
        "document.querySelector('.player .play').scrollIntoView({block: 'center', behavior: 'instant'})"
    )
    browser.execute_script("document.querySelector('.player audio').loop = true")  # however slow this machine is
    browser.find_element("css selector", ".player .play").click()
    until(browser, "return document.querySelector('.player audio').currentTime > 0.2", "it plays")
    before = state(browser)
    assert not before["paused"] and before["error"] is None and before["duration"] > 0.5

    browser.execute_script("document.querySelector('.player audio').pause()")
    at = browser.execute_script("return document.querySelector('.player audio').currentTime = 0.6")
    picture = browser.execute_script("return document.querySelector('.player .picture img').src")
    shown = browser.execute_script("return document.querySelector('.player .alpha').textContent")
    here, last = browser.execute_script(
        "const s = document.querySelector('.player .alpha-slider'); return [Number(s.value), Number(s.max)]"
    )
    others = [stop for stop in range(last + 1) if stop != here]
    turn(browser, others[-1])
    until(browser, "return document.querySelector('.player audio').readyState >= 1", "the other sound loads")
    until(browser, "return document.querySelector('.player audio').currentTime > 0.5", "the position is kept")
    after = state(browser)
    assert after["src"] != before["src"] and after["src"].startswith("blob:")
    assert after["time"] == pytest.approx(at, abs=0.05) and after["paused"]
    assert browser.execute_script("return document.querySelector('.player .picture img').src") != picture
    assert browser.execute_script("return document.querySelector('.player .alpha').textContent") != shown

    # While it plays, it goes on playing from where it is.
    browser.find_element("css selector", ".player .play").click()
    turn(browser, others[0])
    until(browser, "return document.querySelector('.player audio').currentTime > 0.7", "it goes on playing")
    assert state(browser)["src"] not in (before["src"], after["src"])


def test_original_and_codec_are_one_press_away(browser):
    seen = set()
    for source in ("original", "codec", "steered"):
        button = browser.find_element("css selector", f".player .ab [data-source={source}]")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        seen.add(state(browser)["src"])
    assert len(seen) == 3


def test_every_sound_of_the_page_decodes(browser):
    broken = browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        const media = JSON.parse(document.getElementById("media").textContent);
        const context = new OfflineAudioContext(1, 1, 16000);
        const bytes = (url) => Uint8Array.from(atob(url.split(",")[1]), (c) => c.charCodeAt(0)).buffer;
        const sounds = Object.entries(media).filter(([key, url]) => url.startsWith("data:audio"));
        Promise.all(sounds.map(([key, url]) => context.decodeAudioData(bytes(url)).then(
            (b) => b.duration > 0.2 ? null : key, () => key))).then((r) => done([sounds.length, r.filter(Boolean)]));
        """
    )
    assert broken[0] > 20 and broken[1] == []


@pytest.mark.parametrize("opened", [False, True])
def test_no_page_scrolls_sideways_on_a_phone(browser, report, opened):
    pages = sorted(report.glob("*.html"))
    assert len(pages) > 4
    for page in pages:
        browser.get(page.as_uri())
        if opened:
            browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        width, inner, wide = browser.execute_script(
            "const w = document.documentElement.clientWidth;"
            "return [document.documentElement.scrollWidth, window.innerWidth, [...document.body.querySelectorAll('*')]"
            ".filter((e) => e.getBoundingClientRect().right > w + 1 && !e.closest('.scroll, nav, pre, svg'))"
            ".map((e) => e.tagName + '.' + e.className)]"
        )
        assert (width, inner, wide) == (390, 390, []), page.name


def test_the_overview_plays_at_once_and_leads_to_every_page(browser, report):
    browser.get((report / "index.html").as_uri())
    until(browser, "return document.querySelector('.player audio').readyState >= 1", "sound loads")
    button = browser.find_element("css selector", ".player .play")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    browser.execute_script("document.querySelector('.player audio').loop = true")
    button.click()
    until(browser, "return document.querySelector('.player audio').currentTime > 0.1", "it plays")
    names = [link.get_attribute("href") for link in browser.find_elements("css selector", "nav a")]
    assert {name.rpartition("/")[2] for name in names} == {page.name for page in report.glob("*.html")}
    for name in names:
        browser.get(name)
        here = browser.find_element("css selector", "nav a[aria-current=page]")
        assert here.get_attribute("href") == name and browser.find_element("css selector", "h1").text


@pytest.mark.parametrize("by", ["tap", "keyboard"])
def test_a_cell_of_the_matrix_tells_its_sentence(browser, report, by):
    from selenium.webdriver.common.keys import Keys

    browser.get((report / "probes.html").as_uri())
    cell = browser.find_element("css selector", ".matrix .cell")
    said = browser.find_element("id", cell.get_attribute("popovertarget"))
    assert not said.is_displayed() and said.get_attribute("id") == cell.get_attribute("aria-describedby")
    if by == "tap":
        cell.click()
    else:
        cell.send_keys(Keys.ENTER)
    until(browser, "return document.querySelector('.said:popover-open') !== null", "it opens")
    assert said.is_displayed() and cell.get_attribute("title") in said.text
    box = said.rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    if by == "tap":
        browser.execute_script("window.scrollTo(0, 0)")
        browser.find_element("css selector", "h1").click()
    else:
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(browser, "return document.querySelector('.said:popover-open') === null", "it closes")


def test_arms_without_a_strength_and_other_properties_can_be_chosen(browser):
    browser.execute_script(
        "const s = document.querySelector('.player .arm'); s.selectedIndex = s.options.length - 1;"
        "s.dispatchEvent(new Event('change'))"
    )
    assert browser.find_element("css selector", ".player .alpha-slider").get_property("disabled")
    before = state(browser)["src"]
    browser.execute_script(
        "const s = document.querySelector('.player .property'); s.selectedIndex = s.options.length - 1;"
        "s.dispatchEvent(new Event('change'))"
    )
    assert state(browser)["src"] != before


def test_dark_and_light_differ(browser):
    colors = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colors.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert colors[0] != colors[1]


def test_a_page_of_features_filters_opens_and_plays(browser, tmp_path):
    from helpers.features_world import NAMED, make_paged

    paged = make_paged(tmp_path)
    (tmp_path / "mine.csv").write_text(f"sae,feature,caption\ntopk,{NAMED},Rising hum\n")
    page = paged.write_pages(tmp_path / "mine.csv")["topk"]
    browser.get(page.as_uri())
    shown = (
        "return [...document.querySelectorAll('.feature')].filter((one) => one.checkVisibility()).map((one) => one.id)"
    )
    assert len(browser.execute_script(shown)) > 3
    box = browser.find_element("css selector", "#search")
    box.send_keys("HUM rising")
    assert browser.execute_script(shown) == [f"f{NAMED}"]
    assert browser.find_element("css selector", "#count").text.startswith("1 of ")
    browser.execute_script("document.querySelector('#search').value = ''")
    browser.get(f"{page.as_uri()}#f{NAMED}")  # a link from elsewhere opens it
    until(browser, f"return document.querySelector('#f{NAMED}').open", "the entry opens")
    audio = f"document.querySelector('#f{NAMED} audio')"
    line = f"document.querySelector('#f{NAMED} .picture i')"
    browser.execute_script(f"{audio}.loop = true; {audio}.play()")
    until(
        browser, f"return {audio}.currentTime > 0.1 && parseFloat({line}.style.left) > 5", "the line follows the sound"
    )
    wide = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.execute_script(wide)

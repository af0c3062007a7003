"""A real headless browser at a real server: two readers click through a study; what they click is what is kept, and nothing
that would unblind them reaches the browser.
"""

import csv

import pytest
from browser import Browser, find_browser
from reader_studies import ARMS, begin, write_study
from serving import served

from vlmalign.review import access
from vlmalign.review.export import export
from vlmalign.review.outcomes import votes

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def browser():
    find_browser()
    started = Browser()
    yield started
    started.close()


@pytest.fixture
def study(tmp_path):
    """(study, record, address, what went over the wire) of three cases, two arms, films, with script in every text."""
    found, record, app = begin(
        write_study(tmp_path, cases=3, films=True, hostile=HOSTILE, rendering={"hide": ["think"], "tags": False})
    )
    with served(app) as (address, traffic):
        yield found, record, address, traffic


def enter(browser, record, address, name, **size):
    page = browser.page(**size)
    page.goto(f"{address}/enter#{access.invite(record, name)}")
    assert page.script("location.hash") == ""  # the code does not stay in the address
    page.press("button.main", "document.body.innerText.includes('I agree')")
    page.press("button.main", "document.getElementById('case') !== null")
    return page


def pick(page, name, value):
    page.press(
        f"[name='{name}'][value='{value}']", f"document.querySelector(\"[name='{name}'][value='{value}']\").checked"
    )


def fill_in(page, *, preference, level):
    for letter in "AB":
        for key in ("clarity", "information", "accuracy", "feasibility"):
            pick(page, f"answers.{letter}.criteria.{key}", level)
        pick(page, f"answers.{letter}.harm_extent", 1)
        pick(page, f"answers.{letter}.harm_likelihood", 2)
    pick(page, "answers.B.tags", "unsafe")
    pick(page, "preference", preference)
    pick(page, "confidence", 3)


def saved(page):
    page.wait("document.getElementById('status').textContent === 'Saved'")


def turn(page):
    return page.script("Number(document.getElementById('case').dataset.position)")


def close(page):
    before = turn(page)
    page.press(
        "#close",
        f"document.getElementById('case')?.dataset.position !== '{before}' && document.readyState === 'complete'",
    )


@pytest.mark.full
def test_a_reader_clicks_is_interrupted_goes_on_and_the_export_is_what_was_clicked(browser, study, tmp_path):
    found, record, address, traffic = study
    page = enter(browser, record, address, "R01")
    assert page.script("document.title") == "Case 1 of 3 · Infertility care"
    # Closing too early shows what is missing and closes nothing.
    page.press("#close", "!document.getElementById('problem').hidden")
    saved(page)
    assert page.script("document.getElementById('problem').innerText") == "Still to fill in: 14 rows."
    assert page.script("document.querySelectorAll('fieldset.missing').length") == 14
    assert turn(page) == 1
    # Half a form, saved on its own; the window is closed, and another opens where it was.
    pick(page, "answers.A.criteria.clarity", 4)
    page.key("b")  # the key for "B is better"
    page.click("#comment")
    page.type("=half \N{BIOHAZARD SIGN} <i>")
    saved(page)
    page.goto(f"{address}/case")
    assert page.script("document.querySelector('[name=preference]:checked').value") == "B"
    assert page.script("document.getElementById('comment').value") == "=half \N{BIOHAZARD SIGN} <i>"
    assert page.script("document.querySelectorAll(':checked').length") == 2
    # Undo takes back the last save.
    pick(page, "preference", "tie")
    saved(page)
    page.press("#undo", "document.getElementById('status').textContent === 'Undone'")
    assert page.script("document.querySelector('[name=preference]:checked').value") == "B"
    fill_in(page, preference="B", level=3)
    close(page)
    # The connection fails while a case is closed: it is sent again, and counts once.
    fill_in(page, preference="none", level=0)
    saved(page)
    page.offline(True)
    page.press("#close", "document.getElementById('problem').textContent.includes('No connection')")
    page.offline(False)
    page.wait("document.getElementById('case')?.dataset.position === '3'")
    fill_in(page, preference="A", level=1)
    page.key("Enter", code="Enter", number=13, control=True)
    page.wait("document.body.innerText.includes('Who do you think wrote each answer?')")
    for letter in "AB":
        pick(page, f"answers.{letter}.guess", 0)
    page.press("#close", "document.body.innerText.includes('Thank you.')")
    # Nothing of it ran, nothing was refused by the browser but the connection that was cut.
    assert page.script("window.hacked === undefined")
    assert [entry for entry in page.complaints() if "ERR_INTERNET_DISCONNECTED" not in str(entry)] == []
    export(record, found, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "comparisons.csv").open(newline="")))
    assert [(row["preferred_letter"], row["confidence"]) for row in rows] == [("B", "4"), ("none", "4"), ("A", "4")]
    assert rows[0]["comment"] == "'=half \N{BIOHAZARD SIGN} <i>"
    ratings = list(csv.DictReader((tmp_path / "out" / "ratings.csv").open(newline="")))
    assert [row["accuracy"] for row in ratings] == ["4", "4", "1", "1", "2", "2"]
    assert [row["tag_unsafe"] for row in ratings] == ["0", "1"] * 3
    assert all(0 < float(row["active_s"]) <= float(row["elapsed_s"]) + 1 for row in rows)
    check_traffic(traffic, tmp_path)


def check_traffic(traffic, tmp_path):
    sent = b"\n".join(traffic.sent).decode("utf-8", errors="replace").lower()
    assert "ivf with a short protocol" in sent
    for word in (*ARMS, "secret", "zebra", "yak", str(tmp_path).lower()):
        assert word not in sent, word
    assert not any(word in asked for asked in traffic.asked for word in (*ARMS, "secret"))


@pytest.mark.full
def test_two_readers_at_once_see_the_same_cases_in_their_own_order(browser, study, tmp_path):
    _, record, address, traffic = study
    pages = [enter(browser, record, address, name) for name in ("R01", "R02")]
    seen = {0: [], 1: []}
    for _ in range(3):
        for number, page in enumerate(pages):
            seen[number].append(page.script("[...document.querySelectorAll('.text')].map(e => e.innerText)"))
            fill_in(page, preference="A", level=2)
        for page in pages:
            close(page)
    records = [[texts[0] for texts in own] for own in seen.values()]
    assert sorted(records[0]) == sorted(records[1])
    assert len({str(own) for own in seen.values()}) == 2
    assert sum(vote.closed_at is not None for vote in votes(record)) == 6
    check_traffic(traffic, tmp_path)


@pytest.mark.full
def test_a_used_link_and_another_site_get_nowhere(browser, study):
    _, record, address, _ = study
    link = f"{address}/enter#{access.invite(record, 'R01')}"
    page, thief = browser.page(), browser.page()
    page.goto(link)
    page.press("button.main", "document.body.innerText.includes('I agree')")
    thief.goto(link)
    thief.press("button.main", "document.body.innerText.includes('This link does not work')")
    thief.goto(f"{address}/case")
    assert thief.script("location.pathname") == "/enter"
    # A page of another origin in the reader's own browser sends a form with the right token.
    token = page.script("document.querySelector('[name=csrf]').value")
    page.call("Page.navigate", url="about:blank")
    page.wait("location.href === 'about:blank'")
    page.script(
        f"document.body.innerHTML = `<form method=post action='{address}/begin'><input name=csrf value='{token}'></form>`;"
        "document.forms[0].submit()"
    )
    page.wait("document.body.innerText.includes('refused') || document.body.innerText.includes('not signed in')")
    page.goto(f"{address}/case")
    assert page.script("document.body.innerText.includes('I agree')")  # still here, and still not begun


@pytest.mark.full
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 400, 1280])
def test_pages_fit_and_can_be_read(browser, study, width, dark):
    """No sideways scrolling, targets of at least 36 px, every field with a name, text of at least 4.5 : 1 contrast."""
    _, record, address, _ = study
    page = enter(browser, record, address, "R01", width=width, height=800, dark=dark)
    assert page.script("document.documentElement.scrollWidth") <= width
    small = "[...document.querySelectorAll('.choices label, #close, #undo, .tools button')].filter(e => e.getBoundingClientRect().height < 36).length"
    assert page.script(small) == 0
    assert (
        page.script(
            "[...document.querySelectorAll('.choices label')].filter(e => e.getBoundingClientRect().width < 36).length"
        )
        == 0
    )
    nameless = page.call("Accessibility.getFullAXTree")["nodes"]
    for node in nameless:
        if node.get("role", {}).get("value") in (
            "radio",
            "checkbox",
            "button",
            "textbox",
            "slider",
            "progressbar",
            "img",
        ):
            assert node["name"]["value"].strip(), node
    assert page.script(CONTRAST) == []
    # Keyboard: what has the focus is outlined.
    pick(page, "preference", "A")
    page.key("ArrowRight", code="ArrowRight", number=39)
    assert page.script("document.activeElement.value") == "tie"
    assert page.script("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") == "solid"


#: texts whose contrast with the background behind them is below WCAG's 4.5 : 1
CONTRAST = """(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest(":disabled")) continue;
    const [a, b] = [lum(parse(getComputedStyle(e).color)), lum(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push([e.tagName, e.className, e.textContent.slice(0, 30)]);
  }
  return bad;
})()"""


@pytest.mark.full
def test_films_zoom_move_and_change_their_window(browser, study):
    _, record, address, _ = study
    page = enter(browser, record, address, "R01")
    page.wait("document.querySelector('.view img').complete")
    style = "document.querySelector('.view img').style"
    page.click("[data-do=in]")
    page.click("[data-do=in]")
    assert "scale(1.96)" in page.script(f"{style}.transform")
    page.script("document.querySelector('.view').focus()")
    before = page.script(f"{style}.transform")
    page.key("ArrowLeft", code="ArrowLeft", number=37)
    assert page.script(f"{style}.transform") != before
    level = "document.querySelector('[data-grey=%s]')"
    page.script(
        f"{level % 'level'}.value = 64, {level % 'window'}.value = 51, {level % 'level'}.dispatchEvent(new Event('input'))"
    )
    assert "#grey-1" in page.script(f"{style}.filter")
    # Grey 64 is the middle of the window of 51: slope 5, and 64 / 255 becomes 1/2.
    slope, intercept = page.script(
        "['slope', 'intercept'].map(n => Number(document.querySelector('feFuncG').getAttribute(n)))"
    )
    assert slope == 5
    assert abs(slope * 64 / 255 + intercept - 0.5) < 1e-6
    page.click("[data-do=invert]")
    slope, intercept = page.script(
        "['slope', 'intercept'].map(n => Number(document.querySelector('feFuncG').getAttribute(n)))"
    )
    assert slope == -5
    assert abs(slope * 64 / 255 + intercept - 0.5) < 1e-6
    page.click("[data-do=reset]")
    assert page.script(f"{style}.transform + {style}.filter") == ""
    assert page.complaints() == []

"""The one script of the galleries: shows the answers of a kind of verdict, a label and a state, and says how many they are.

Without it the page is whole: all answers, and no form. The page's security policy allows this script alone, by its hash.
"""

from __future__ import annotations

from markupsafe import Markup

from vlmalign.reporting.pages import allowed

_SOURCE = """
(() => {
  const form = document.getElementById("filter");
  const said = document.getElementById("shown");
  const cases = [...document.querySelectorAll(".case")];
  const answers = document.querySelectorAll(".answer").length;

  function has(answer, name, value) {
    return answer.dataset[name].split(" ").includes(value);
  }

  function fits(answer, kind, label, state) {
    if (state !== "" && answer.dataset.state !== state) return false;
    if (kind !== "" && !has(answer, "kinds", kind)) return false;
    if (label === "") return true;
    // A missed label is one that this answer missed, not any label of an answer that missed another.
    if (kind === "missed" || kind === "alarm") return has(answer, kind, label);
    return has(answer, "true", label) || has(answer, "named", label);
  }

  function show() {
    const [kind, label, state] = ["kind", "label", "state"].map((name) => form.elements[name].value);
    let shown = 0, films = 0;
    for (const one of cases) {
      let any = false;
      for (const answer of one.querySelectorAll(".answer")) {
        answer.hidden = !fits(answer, kind, label, state);
        if (!answer.hidden) { any = true; shown += 1; }
      }
      one.hidden = !any;
      films += any;
    }
    said.textContent = shown + " of " + answers + " answers shown, of " + films + " of " + cases.length + " films.";
  }

  form.addEventListener("change", show);
  form.hidden = false;
  show();
})();
"""

SCRIPT = Markup(_SOURCE)
ALLOWED = allowed(_SOURCE)

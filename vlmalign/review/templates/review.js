// The page of a case: autosave, undo, close, keys, films. Nothing here knows who wrote what; the server does not say.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const enter = document.querySelector("[data-enter]");
  if (enter) fillIn(enter);
  const form = document.getElementById("case");
  if (form) startCase(form);
  document.querySelectorAll("[data-film]").forEach(startFilm);
});

// The link's code stands behind "#": it is not sent with the address, and is taken off it at once.
function fillIn(form) {
  if (location.hash.length < 2) return;
  const token = form.elements.token;
  token.value = location.hash.slice(1);
  token.hidden = form.querySelector("[for=token]").hidden = true;
  history.replaceState(null, "", location.pathname);
}

function startCase(form) {
  const status = document.getElementById("status");
  const problem = document.getElementById("problem");
  const undo = document.getElementById("undo");
  const close = document.getElementById("close");
  const position = Number(form.dataset.position);
  let revision = Number(form.dataset.revision);
  let waiting = null; // timer of the next save
  let queue = Promise.resolve(); // requests go out one after the other
  let closing = false;

  // A stopwatch that runs while the page is in view.
  let active = Number(form.dataset.active);
  let since = document.visibilityState === "visible" ? performance.now() : null;
  const activeMs = () => Math.round(active + (since === null ? 0 : performance.now() - since));
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible") {
      since = performance.now();
    } else {
      active = activeMs();
      since = null;
      if (waiting !== null) save();
    }
  });

  const say = (words, bad) => {
    status.textContent = words;
    status.classList.toggle("bad", Boolean(bad));
  };
  // What is wrong: with the connection until a request succeeds, with the form until it is closed again.
  const complain = (words, aboutSending = false) => {
    problem.textContent = words;
    problem.hidden = !words;
    problem.toggleAttribute("data-sending", aboutSending);
  };

  // Sends until the server has answered: the same key, so that it counts once however often it arrives.
  async function send(path, entry) {
    const change = { position, revision, key: newKey(), active_ms: activeMs(), entry };
    for (let wait = 1000; ; wait = Math.min(2 * wait, 20000)) {
      let answer = null;
      try {
        answer = await fetch(path, {
          method: "POST",
          headers: { "content-type": "application/json", "x-csrf-token": form.dataset.csrf },
          body: JSON.stringify(change),
        });
      } catch {
        complain("No connection to the server. Your entries stay on this page and are sent as soon as it is back.", true);
      }
      if (answer && answer.ok) {
        const saved = await answer.json();
        revision = saved.revision;
        undo.disabled = !saved.can_undo;
        if (problem.hasAttribute("data-sending")) complain("");
        return saved;
      }
      if (answer) {
        const told = (await answer.json().catch(() => ({}))).sentence || "The server could not save this.";
        if (answer.status < 500) throw new Error(told);
        complain(told, true);
      }
      say("Not saved", true);
      await new Promise((done) => setTimeout(done, wait));
    }
  }

  const after = (work) => {
    queue = queue.then(work).catch((error) => {
      complain(error.message);
      say("Not saved", true);
      closing = false;
      close.disabled = false;
    });
    return queue;
  };

  function save() {
    clearTimeout(waiting);
    waiting = null;
    say("Saving…");
    return after(async () => {
      await send("/save", readEntry(form));
      if (waiting === null && !closing) say("Saved");
    });
  }

  function changed() {
    if (closing) return;
    say("");
    clearTimeout(waiting);
    waiting = setTimeout(save, 500);
  }

  form.addEventListener("change", (event) => {
    event.target.closest("fieldset")?.classList.remove("missing");
    if (event.target.name) changed();
  });
  form.addEventListener("input", (event) => {
    if (event.target.matches("textarea")) changed();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("beforeunload", (event) => {
    if (waiting !== null && !closing) event.preventDefault();
  });

  undo.addEventListener("click", () => {
    if (waiting !== null) save();
    after(async () => {
      const saved = await send("/undo");
      writeEntry(form, saved.entry);
      say("Undone");
    });
  });

  close.addEventListener("click", () => {
    if (closing) return;
    clearTimeout(waiting);
    waiting = null;
    const open = unanswered(form);
    if (open.length) {
      save();
      open.forEach((group) => group.classList.add("missing"));
      complain(`Still to fill in: ${open.length === 1 ? "one row" : open.length + " rows"}.`);
      open[0].scrollIntoView({ block: "center" });
      open[0].querySelector("input").focus({ preventScroll: true });
      return;
    }
    closing = true;
    close.disabled = true;
    complain("");
    say("Saving…");
    after(async () => {
      await send("/close", readEntry(form));
      location.replace("/case");
    });
  });

  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
      event.preventDefault();
      close.click();
      return;
    }
    const typing = event.target.matches("textarea, input:not([type=radio]):not([type=checkbox])");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || event.target.closest(".view")) return;
    if (event.key === "u" && !undo.disabled) undo.click();
    const value = { t: "tie", n: "none" }[event.key] || event.key.toUpperCase();
    const choice = [...form.querySelectorAll("[name=preference]")].find((input) => input.value === value);
    if (choice) {
      choice.click();
      choice.focus();
    }
  });
}

// Rows that must be answered and are not. The server checks again, and knows more (a correction's text).
function unanswered(form) {
  return [...form.querySelectorAll("fieldset")].filter((group) => {
    const radios = [...group.querySelectorAll("input[type=radio]")];
    return radios.length > 0 && !radios.some((radio) => radio.checked);
  });
}

// The form as an entry: a field's name is its path ("answers.A.criteria.clarity").
function readEntry(form) {
  const entry = { answers: {} };
  for (const input of form.elements) {
    if (!input.name) continue;
    const choice = input.type === "radio" || input.type === "checkbox";
    if (choice && !input.checked) continue;
    if (!choice && input.value === "") continue;
    const path = input.name.split(".");
    const last = path.pop();
    let place = entry;
    for (const part of path) place = place[part] ??= {};
    if (input.type === "checkbox") (place[last] ??= []).push(input.value);
    else place[last] = input.dataset.number === undefined ? input.value : Number(input.value);
  }
  return entry;
}

function writeEntry(form, entry) {
  for (const input of form.elements) {
    if (!input.name) continue;
    const value = input.name.split(".").reduce((place, part) => place?.[part], entry);
    if (input.type === "checkbox") input.checked = (value || []).includes(input.value);
    else if (input.type === "radio") input.checked = value !== undefined && String(value) === input.value;
    else input.value = value ?? "";
  }
}

function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Zoom, pan, window and level. Of a grey level x in 0..1 the film shows (x - (level - window / 2)) / window.
function startFilm(figure) {
  const view = figure.querySelector(".view");
  const image = view.querySelector("img");
  const [level, width] = ["level", "window"].map((name) => figure.querySelector(`[data-grey=${name}]`));
  const invert = figure.querySelector("[data-do=invert]");
  let zoom = 1;
  let at = { x: 0, y: 0 };
  const fingers = new Map();

  function draw() {
    const box = view.getBoundingClientRect();
    at.x = Math.min(0, Math.max(box.width * (1 - zoom), at.x));
    at.y = Math.min(0, Math.max(box.height * (1 - zoom), at.y));
    image.style.transform = zoom === 1 ? "" : `translate(${at.x}px, ${at.y}px) scale(${zoom})`;
    view.classList.toggle("zoomed", zoom > 1);
    const low = level.value / 255 - width.value / 510;
    const sign = invert.getAttribute("aria-pressed") === "true" ? -1 : 1;
    const slope = (sign * 255) / width.value;
    const intercept = sign > 0 ? -low * slope : 1 - low * slope;
    figure.querySelectorAll("feFuncR, feFuncG, feFuncB").forEach((part) => {
      part.setAttribute("slope", slope);
      part.setAttribute("intercept", intercept);
    });
    const plain = slope === 1 && Math.abs(intercept) < 0.003;
    image.style.filter = plain ? "" : `url(#grey-${figure.dataset.film})`;
  }

  function zoomTo(next, x, y) {
    const box = view.getBoundingClientRect();
    const centre = { x: x === undefined ? box.width / 2 : x - box.left, y: y === undefined ? box.height / 2 : y - box.top };
    next = Math.min(12, Math.max(1, next));
    at = { x: centre.x - ((centre.x - at.x) * next) / zoom, y: centre.y - ((centre.y - at.y) * next) / zoom };
    zoom = next;
    draw();
  }

  const actions = {
    in: () => zoomTo(zoom * 1.4),
    out: () => zoomTo(zoom / 1.4),
    invert: () => {
      invert.setAttribute("aria-pressed", String(invert.getAttribute("aria-pressed") !== "true"));
      draw();
    },
    reset: () => {
      level.value = 128;
      width.value = 255;
      invert.setAttribute("aria-pressed", "false");
      zoomTo(1);
    },
  };
  for (const [name, act] of Object.entries(actions)) {
    figure.querySelector(`[data-do=${name}]`).addEventListener("click", act);
  }
  level.addEventListener("input", draw);
  width.addEventListener("input", draw);

  view.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
    const key = { "+": "in", "=": "in", "-": "out", 0: "reset" }[event.key];
    if (key) actions[key]();
    else if (moves[event.key] && zoom > 1) {
      at = { x: at.x + moves[event.key][0], y: at.y + moves[event.key][1] };
      draw();
    } else return;
    event.preventDefault();
  });
  view.addEventListener("dblclick", (event) => zoomTo(zoom > 1 ? 1 : 2.5, event.clientX, event.clientY));
  view.addEventListener(
    "wheel",
    (event) => {
      // A wheel scrolls the page unless the film was clicked or Ctrl is held.
      if (!event.ctrlKey && document.activeElement !== view) return;
      event.preventDefault();
      zoomTo(zoom * Math.exp(-event.deltaY / 400), event.clientX, event.clientY);
    },
    { passive: false },
  );

  view.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (event.pointerType === "mouse" || zoom > 1 || fingers.size > 1) view.setPointerCapture(event.pointerId);
  });
  view.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = { x: event.clientX, y: event.clientY };
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    fingers.set(event.pointerId, now);
    if (other) {
      const grown = Math.hypot(now.x - other.x, now.y - other.y) / Math.hypot(before.x - other.x, before.y - other.y);
      zoomTo(zoom * grown, (now.x + other.x) / 2, (now.y + other.y) / 2);
    } else if (event.shiftKey || event.buttons === 2) {
      // As in a PACS: across changes the window, down the level.
      width.value = Number(width.value) + (now.x - before.x);
      level.value = Number(level.value) + (now.y - before.y);
      draw();
    } else if (zoom > 1) {
      at = { x: at.x + now.x - before.x, y: at.y + now.y - before.y };
      draw();
    }
  });
  for (const name of ["pointerup", "pointercancel"]) view.addEventListener(name, (event) => fingers.delete(event.pointerId));
  view.addEventListener("contextmenu", (event) => event.preventDefault());
  addEventListener("resize", draw);
}

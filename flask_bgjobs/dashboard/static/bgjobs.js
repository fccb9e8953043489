// Keeps a page of the dashboard up to date, and its colours as the visitor likes them.
// Every page works without this file.
(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("bgj-scripted");
  const LONGEST_SECONDS = 60, USUAL_SECONDS = 5;

  // What this browser remembers; a private window may not.
  function recall(key) {
    try { return localStorage.getItem(key); } catch { return null; }
  }
  function keep(key, value) {
    try { localStorage.setItem(key, value); } catch { /* It holds for this page. */ }
  }

  // Theme: in our own layout only, a host's page decides for itself. Set before the first paint.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => recall("bgjobs-theme") || (dark.matches ? "dark" : "light");
  function paint() {
    root.dataset.bsTheme = theme();
    const button = document.querySelector("[data-bgjobs-theme]");
    if (button) {
      button.hidden = false;
      button.textContent = theme() === "dark" ? "Light" : "Dark";
      button.setAttribute("aria-label", `Use the ${button.textContent.toLowerCase()} theme`);
    }
  }
  function toggle() {
    keep("bgjobs-theme", theme() === "dark" ? "light" : "dark");
    paint();
  }
  if ("bgjobs" in root.dataset) {
    paint();
    dark.addEventListener("change", paint);
  }

  // Times: the words grow old between two answers of the server.
  let ahead = 0; // of the server's clock, in milliseconds
  const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  function relative(seconds) {
    const [size, unit] = UNITS.find(([size]) => Math.abs(seconds) >= size) || [];
    if (!unit) return "now";
    const words = `${Math.floor(Math.abs(seconds) / size)} ${unit}`;
    return seconds > 0 ? `in ${words}` : `${words} ago`;
  }
  const CLOCK = new Intl.DateTimeFormat("sv-SE", { dateStyle: "short", timeStyle: "long" });
  function age() {
    const now = Date.now() + ahead;
    for (const time of document.querySelectorAll(".bgj time")) {
      const moment = Date.parse(time.dateTime);
      // In the visitor's zone, which stands behind it.
      const clock = CLOCK.format(moment);
      const isClock = "bgjobsClock" in time.dataset;
      const words = isClock ? clock : relative((moment - now) / 1000);
      if (time.textContent !== words) time.textContent = words;
      if (!isClock && time.title !== clock) time.title = clock;
    }
  }

  // Turns what stands in an element into `html`. What the visitor has typed, checked and opened stays.
  const MADE_BY_VISITOR = {
    DETAILS: ["open"], INPUT: ["checked"], OPTION: ["selected"], TR: ["tabindex"],
  };
  const TYPED = "input:not([type=hidden], [type=checkbox], [type=radio]), textarea";
  function isMadeByVisitor(name, node) {
    return MADE_BY_VISITOR[node.nodeName]?.includes(name) || (name === "value" && node.matches(TYPED));
  }
  function morph(element, html) {
    Idiomorph.morph(element, html, {
      morphStyle: "innerHTML",
      callbacks: {
        beforeAttributeUpdated: (name, node) => !isMadeByVisitor(name, node),
        // It may say for a moment that it has copied.
        beforeNodeMorphed: (node) => !(node instanceof HTMLElement && "bgjobsCopy" in node.dataset),
      },
    });
  }

  // Refresh: asks for the changing part of this page, and learns with 304 that nothing changed.
  let etag = null, failures = 0, timer = null;
  // Why the page must not change just now; empty where it may.
  function obstacle(live) {
    const selection = getSelection();
    if (document.querySelector("dialog[open], .bgj-confirm[open]")) return "a question is open";
    if (chosen().length) return "jobs are chosen";
    if (isAiming(live)) return "the pointer is on a row";
    if (!selection.isCollapsed && live.contains(selection.anchorNode)) return "text is selected";
    return "";
  }
  // Rows must not move under a pointer that is about to press a button or to check a box.
  const STILL_MS = 1500;
  let pointed = 0, isPressed = false, hovers = matchMedia("(hover: hover)").matches;
  function isAiming(live) {
    if (isPressed) return true;
    return hovers && Boolean(live.querySelector("tbody :is(button, input, summary):hover") ||
      (live.querySelector("tbody tr:hover") && performance.now() - pointed < STILL_MS));
  }
  for (const move of ["pointermove", "pointerdown"]) {
    document.addEventListener(move, (event) => {
      // A finger hovers over nothing, but what it touched last keeps `:hover`.
      hovers = event.pointerType !== "touch";
      pointed = performance.now();
      if (move === "pointerdown") isPressed = true;
    });
  }
  for (const end of ["pointerup", "pointercancel", "contextmenu", "blur"]) {
    // A click follows, which has to find the button where it was.
    window.addEventListener(end, () => setTimeout(() => { isPressed = false; }, 50));
  }
  async function refresh(live) {
    const headers = { "X-Bgjobs-Fragment": "1", ...(etag && { "If-None-Match": etag }) };
    const from = live.dataset.bgjobsFrom || location.href;
    const response = await fetch(from, { headers, redirect: "manual", cache: "no-store" });
    if (response.type === "opaqueredirect" || [401, 403, 404].includes(response.status)) {
      return location.reload(); // Logged out, or gone: the whole page says so.
    }
    if (response.status !== 304 && !response.ok) throw new Error(`status ${response.status}`);
    const date = Date.parse(response.headers.get("Date"));
    if (date) ahead = date - Date.now();
    for (const input of document.querySelectorAll("[data-bgjobs-token]")) {
      input.value = response.headers.get("X-CSRFToken") || input.value;
    }
    if (response.status === 304) return;
    const html = await response.text();
    if (obstacle(live)) return;
    morph(live, html);
    showLocalTimes();
    etag = response.headers.get("ETag");
  }
  async function turn(live) {
    held = obstacle(live);
    turnsHeld = held ? turnsHeld + 1 : 0;
    if (!held && !document.hidden) {
      try {
        await refresh(live);
        failures = 0;
        refreshed = new Date();
      } catch {
        failures += 1;
      }
    }
    age();
    tellFreshness();
    schedule(live);
  }
  // Where a page does not refresh, or cannot, it says so: old figures look like new ones.
  let refreshed = new Date(), held = "", turnsHeld = 0;
  function tellFreshness() {
    const note = document.querySelector("[data-bgjobs-fresh]");
    if (!note) return;
    const time = refreshed.toLocaleTimeString([], { timeStyle: "medium" });
    let words = "";
    if (failures > 1) words = `Not refreshed since ${time}: the server does not answer`;
    else if (chosen().length) words = "Not refreshed while jobs are chosen";
    // Once is no news: a pointer often rests for a moment.
    else if (turnsHeld > 1) words = `Not refreshed while ${held}`;
    note.classList.toggle("bgj-stale", failures > 1);
    if (note.textContent !== words) note.textContent = words;
  }
  const seconds = () => Number(recall("bgjobs-seconds") ?? USUAL_SECONDS);
  function schedule(live) {
    clearTimeout(timer);
    if (!seconds()) {
      turnsHeld = 0;
      return;
    }
    // After an error ever more seldom: the server has enough to do.
    const wait = Math.max(seconds(), Math.min(seconds() * 2 ** failures, LONGEST_SECONDS));
    timer = setTimeout(turn, wait * 1000, live);
  }
  function offerInterval(live) {
    const select = document.querySelector("[data-bgjobs-interval]");
    if (!select) return;
    select.value = String(seconds());
    select.hidden = false;
    select.addEventListener("change", () => {
      keep("bgjobs-seconds", select.value);
      schedule(live);
    });
  }

  // Choosing rows, and asking before many jobs are changed. The question is the server's own page.
  const boxes = () => [...document.querySelectorAll('[name="id"][form="bgjobs-bulk"]')];
  const chosen = () => boxes().filter((box) => box.checked);
  function choosePage(all) {
    for (const box of boxes()) box.checked = all.checked;
  }
  function countChosen() {
    const number = chosen().length;
    const output = document.querySelector("[data-bgjobs-chosen]");
    if (output) output.textContent = number ? `${number} chosen` : "";
    tellFreshness();
  }
  async function ask(form, button) {
    const body = new FormData(form, button);
    const response = await fetch(button.formAction, {
      method: "POST", body, headers: { "X-Bgjobs-Fragment": "1" }, redirect: "manual",
    });
    // Nothing was chosen, or the login has run out: the whole page says so.
    if (response.type === "opaqueredirect" || !response.ok) return location.reload();
    show(new DOMParser().parseFromString(await response.text(), "text/html").body.childNodes);
  }
  function show(nodes) {
    const dialog = document.createElement("dialog");
    dialog.className = "bgj-dialog";
    dialog.append(...nodes);
    dialog.setAttribute("aria-labelledby", dialog.querySelector("h1, h2").id);
    document.querySelector(".bgj").append(dialog);
    dialog.addEventListener("close", () => dialog.remove());
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog || event.target.closest("[data-bgjobs-close]")) {
        event.preventDefault();
        dialog.close();
      }
    });
    dialog.showModal();
  }
  // Times of a filter: shown in the visitor's zone, as all others are, and sent in UTC.
  const LOCAL = new Intl.DateTimeFormat("sv-SE", { dateStyle: "short", timeStyle: "medium" });
  // A year has four digits here, the first one too.
  const local = (utc) => LOCAL.format(new Date(`${utc}Z`)).replace(" ", "T").padStart(19, "0");
  const given = new WeakMap(); // what each field held, in UTC and as it is shown
  function showLocalTimes() {
    for (const input of document.querySelectorAll("[data-bgjobs-utc]")) {
      if (given.has(input)) continue;
      // Not its value, which the browser may have kept from before a reload.
      const utc = input.defaultValue;
      if (utc) input.value = local(utc);
      given.set(input, { utc, shown: input.value });
    }
    for (const label of document.querySelectorAll("[data-bgjobs-zoned]")) {
      label.textContent = label.dataset.bgjobsZoned;
    }
  }
  document.addEventListener("formdata", (event) => {
    for (const input of event.target.querySelectorAll("[data-bgjobs-utc]")) {
      if (!input.value || !given.has(input)) continue;
      const { utc, shown } = given.get(input);
      // An hour that a zone repeats could be either one.
      const time = input.value === shown ? utc : new Date(input.value).toISOString().slice(0, 19);
      event.formData.set(input.name, time);
    }
  });

  document.addEventListener("submit", (event) => {
    if (!event.target.matches("[data-bgjobs-confirm]") || !event.submitter) return;
    event.preventDefault();
    ask(event.target, event.submitter).catch(() => {
      event.target.action = event.submitter.formAction;
      event.target.submit();
    });
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-bgjobs-all]")) choosePage(event.target);
    // By its attribute: the form's own `id` is hidden by the boxes of that name.
    if (event.target.form?.matches("#bgjobs-bulk")) countChosen();
  });

  // Tells who listens what the eye sees.
  function say(words) {
    let said = document.getElementById("bgjobs-said");
    if (!said) {
      said = document.createElement("p");
      Object.assign(said, { id: "bgjobs-said", className: "visually-hidden" });
      said.setAttribute("role", "status");
      document.querySelector(".bgj").append(said);
    }
    said.textContent = words;
  }

  // Copies what stands in the element that the button names.
  async function copy(button) {
    const text = document.getElementById(button.dataset.bgjobsCopy);
    try {
      await navigator.clipboard.writeText(text.textContent);
      const word = button.firstChild;
      word.data = "Copied";
      say("Copied");
      setTimeout(() => { word.data = "Copy"; }, 2000);
    } catch {
      getSelection().selectAllChildren(text); // Not allowed here: Ctrl+C does it.
    }
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-bgjobs-copy]");
    if (button) copy(button);
  });

  // Keys: / searches, j and k go down and up the rows, x chooses one, r refreshes, ? tells.
  const KEYS = [["/", "go to the search box"], ["j", "next row"], ["k", "row before"],
    ["x", "choose the row"], ["r", "refresh"], ["?", "these keys"]];
  function go(step) {
    const rows = [...document.querySelectorAll(".bgj-table tbody tr")];
    const at = rows.findIndex((row) => row.contains(document.activeElement));
    const row = rows[Math.min(Math.max(at + step, 0), rows.length - 1)];
    if (!row) return;
    const link = row.querySelector("a");
    if (!link) row.tabIndex = -1;
    (link || row).focus();
  }
  function tellKeys() {
    const template = document.createElement("template");
    template.innerHTML = '<h2 id="bgjobs-keys">Keys</h2><dl class="bgj-facts"></dl>';
    for (const [key, words] of KEYS) {
      const [item, term, text] = ["div", "dt", "dd"].map((name) => document.createElement(name));
      term.append(Object.assign(document.createElement("kbd"), { textContent: key }));
      text.textContent = words;
      item.append(term, text);
      template.content.querySelector("dl").append(item);
    }
    show(template.content.childNodes);
  }
  function closeMenus(except) {
    for (const menu of document.querySelectorAll(".bgj-choice[open]")) {
      if (menu.contains(except)) continue;
      if (menu.contains(document.activeElement)) menu.querySelector("summary").focus();
      menu.open = false;
    }
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") closeMenus();
    const typing = event.target.matches("input:not([type=checkbox]), textarea, select");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (!("bgjobs" in root.dataset)) return; // In a host's layout the keys are the host's.
    const box = document.activeElement.closest("tr")?.querySelector('[name="id"]');
    const acts = {
      "/": () => document.getElementById("bgjobs-q")?.focus(), j: () => go(1), k: () => go(-1),
      x: () => box?.click(), r: () => location.reload(), "?": tellKeys,
    };
    if (!(event.key in acts)) return;
    event.preventDefault();
    acts[event.key]();
  });

  document.addEventListener("DOMContentLoaded", () => {
    if ("bgjobs" in root.dataset) paint();
    document.querySelector("[data-bgjobs-theme]")?.addEventListener("click", toggle);
    const keys = document.querySelector("[data-bgjobs-keys]");
    if (keys) {
      keys.hidden = false;
      keys.addEventListener("click", tellKeys);
    }
    age();
    showLocalTimes();
    document.querySelector('[aria-invalid="true"]')?.focus();
    const live = document.querySelector("[data-bgjobs-live]");
    if (!live) return;
    offerInterval(live);
    schedule(live);
  });
  document.addEventListener("click", (event) => closeMenus(event.target));
})();

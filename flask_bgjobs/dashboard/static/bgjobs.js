// Refreshes the pages of the dashboard, switches the theme, shows local times, and handles
// confirmations and keys. Every page also works without this script.
(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("bgj-scripted");
  const MAX_SECONDS = 60, DEFAULT_SECONDS = 5;

  // Settings in the browser's local storage, which may be unavailable in a private window.
  function recall(key) {
    try { return localStorage.getItem(key); } catch { return null; }
  }
  function keep(key, value) {
    try { localStorage.setItem(key, value); } catch { /* The setting is lost when the page closes. */ }
  }

  // Theme: only in the dashboard's own layout; a host's layout has its own. Set before the first
  // paint, so that the page does not flash in the other theme.
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

  // Times: relative times such as "3 s ago" are updated between two refreshes.
  let clockOffset = 0; // server's clock minus this browser's, in milliseconds
  const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  function relative(seconds) {
    const [size, unit] = UNITS.find(([size]) => Math.abs(seconds) >= size) || [];
    if (!unit) return "now";
    const words = `${Math.floor(Math.abs(seconds) / size)} ${unit}`;
    return seconds > 0 ? `in ${words}` : `${words} ago`;
  }
  const CLOCK = new Intl.DateTimeFormat("sv-SE", { dateStyle: "short", timeStyle: "long" });
  function updateTimes() {
    const now = Date.now() + clockOffset;
    for (const time of document.querySelectorAll(".bgj time")) {
      const moment = Date.parse(time.dateTime);
      // In the visitor's time zone, with its name.
      const clock = CLOCK.format(moment);
      const isClock = "bgjobsClock" in time.dataset;
      const words = isClock ? clock : relative((moment - now) / 1000);
      if (time.textContent !== words) time.textContent = words;
      if (!isClock && time.title !== clock) time.title = clock;
    }
  }

  // Changes the content of an element into `html`, but keeps what the visitor has typed, checked
  // and opened.
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
        // A copy button may be showing "Copied" just then.
        beforeNodeMorphed: (node) => !(node instanceof HTMLElement && "bgjobsCopy" in node.dataset),
      },
    });
  }

  // Refresh: requests the part of the page that changes; the server responds with 304 when it is
  // unchanged.
  let etag = null, failures = 0, timer = null;
  // Why the page must not change at the moment; empty when it may.
  function holdReason(live) {
    const selection = getSelection();
    if (document.querySelector("dialog[open], .bgj-confirm[open]")) return "a dialog is open";
    if (selected().length) return "jobs are selected";
    if (isAiming(live)) return "the pointer is on a row";
    if (!selection.isCollapsed && live.contains(selection.anchorNode)) return "text is selected";
    return "";
  }
  // Rows must not move while the visitor is about to click a button or a checkbox.
  const STILL_MS = 1500;
  let pointed = 0, isPressed = false, hovers = matchMedia("(hover: hover)").matches;
  function isAiming(live) {
    if (isPressed) return true;
    return hovers && Boolean(live.querySelector("tbody :is(button, input, summary):hover") ||
      (live.querySelector("tbody tr:hover") && performance.now() - pointed < STILL_MS));
  }
  for (const move of ["pointermove", "pointerdown"]) {
    document.addEventListener(move, (event) => {
      // Touch has no hover, but the element that was touched last keeps `:hover`.
      hovers = event.pointerType !== "touch";
      pointed = performance.now();
      if (move === "pointerdown") isPressed = true;
    });
  }
  for (const end of ["pointerup", "pointercancel", "contextmenu", "blur"]) {
    // The click event follows, and must reach the button before a refresh moves it.
    window.addEventListener(end, () => setTimeout(() => { isPressed = false; }, 50));
  }
  async function refresh(live) {
    const headers = { "X-Bgjobs-Fragment": "1", ...(etag && { "If-None-Match": etag }) };
    const from = live.dataset.bgjobsFrom || location.href;
    const response = await fetch(from, { headers, redirect: "manual", cache: "no-store" });
    if (response.type === "opaqueredirect" || [401, 403, 404].includes(response.status)) {
      return location.reload(); // Logged out, or the job was deleted: the full page says which.
    }
    if (response.status !== 304 && !response.ok) throw new Error(`status ${response.status}`);
    const date = Date.parse(response.headers.get("Date"));
    if (date) clockOffset = date - Date.now();
    for (const input of document.querySelectorAll("[data-bgjobs-token]")) {
      input.value = response.headers.get("X-CSRFToken") || input.value;
    }
    if (response.status === 304) return;
    const html = await response.text();
    if (holdReason(live)) return;
    morph(live, html);
    showLocalTimes();
    etag = response.headers.get("ETag");
  }
  async function tick(live) {
    heldBy = holdReason(live);
    heldTicks = heldBy ? heldTicks + 1 : 0;
    if (!heldBy && !document.hidden) {
      try {
        await refresh(live);
        failures = 0;
        refreshedAt = new Date();
      } catch {
        failures += 1;
      }
    }
    updateTimes();
    showFreshness();
    schedule(live);
  }
  // Says when the page is not refreshed, because old figures look like current ones.
  let refreshedAt = new Date(), heldBy = "", heldTicks = 0;
  function showFreshness() {
    const note = document.querySelector("[data-bgjobs-fresh]");
    if (!note) return;
    const time = refreshedAt.toLocaleTimeString([], { timeStyle: "medium" });
    let words = "";
    if (failures > 1) words = `Not refreshed since ${time}: the server does not answer`;
    else if (selected().length) words = "Not refreshed while jobs are selected";
    // Not at the first skipped refresh: the pointer often rests on a row for a moment.
    else if (heldTicks > 1) words = `Not refreshed while ${heldBy}`;
    note.classList.toggle("bgj-stale", failures > 1);
    if (note.textContent !== words) note.textContent = words;
  }
  const seconds = () => Number(recall("bgjobs-seconds") ?? DEFAULT_SECONDS);
  function schedule(live) {
    clearTimeout(timer);
    if (!seconds()) {
      heldTicks = 0;
      return;
    }
    // The interval doubles after each error, so that a server in trouble gets fewer requests.
    const wait = Math.max(seconds(), Math.min(seconds() * 2 ** failures, MAX_SECONDS));
    timer = setTimeout(tick, wait * 1000, live);
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

  // Selecting rows, and confirming bulk actions. The server renders the confirmation.
  const boxes = () => [...document.querySelectorAll('[name="id"][form="bgjobs-bulk"]')];
  const selected = () => boxes().filter((box) => box.checked);
  function selectPage(all) {
    for (const box of boxes()) box.checked = all.checked;
  }
  function showSelectedCount() {
    const number = selected().length;
    const output = document.querySelector("[data-bgjobs-chosen]");
    if (output) output.textContent = number ? `${number} selected` : "";
    showFreshness();
  }
  async function ask(form, button) {
    const body = new FormData(form, button);
    const response = await fetch(button.formAction, {
      method: "POST", body, headers: { "X-Bgjobs-Fragment": "1" }, redirect: "manual",
    });
    // Nothing was selected, or the login has expired: the full page says which.
    if (response.type === "opaqueredirect" || !response.ok) return location.reload();
    showDialog(new DOMParser().parseFromString(await response.text(), "text/html").body.childNodes);
  }
  function showDialog(nodes) {
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
  // Time filters: shown in the visitor's time zone, and sent in UTC.
  const LOCAL = new Intl.DateTimeFormat("sv-SE", { dateStyle: "short", timeStyle: "medium" });
  // Padded, because a datetime-local field needs a year of four digits.
  const local = (utc) => LOCAL.format(new Date(`${utc}Z`)).replace(" ", "T").padStart(19, "0");
  const originals = new WeakMap(); // by field: its original time in UTC, and the text shown for it
  function showLocalTimes() {
    for (const input of document.querySelectorAll("[data-bgjobs-utc]")) {
      if (originals.has(input)) continue;
      // Not `value`: after a reload, the browser may have restored an older one.
      const utc = input.defaultValue;
      if (utc) input.value = local(utc);
      originals.set(input, { utc, shown: input.value });
    }
    for (const label of document.querySelectorAll("[data-bgjobs-zoned]")) {
      label.textContent = label.dataset.bgjobsZoned;
    }
  }
  document.addEventListener("formdata", (event) => {
    for (const input of event.target.querySelectorAll("[data-bgjobs-utc]")) {
      if (!input.value || !originals.has(input)) continue;
      const { utc, shown } = originals.get(input);
      // Unchanged fields send their original time: when clocks are set back, a local time occurs
      // twice, and could be converted to the wrong one.
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
    if (event.target.matches("[data-bgjobs-all]")) selectPage(event.target);
    // Not `form.id`: in this form, that is the checkboxes named "id".
    if (event.target.form?.matches("#bgjobs-bulk")) showSelectedCount();
  });

  // Announces `words` to screen readers.
  function announce(words) {
    let status = document.getElementById("bgjobs-said");
    if (!status) {
      status = document.createElement("p");
      Object.assign(status, { id: "bgjobs-said", className: "visually-hidden" });
      status.setAttribute("role", "status");
      document.querySelector(".bgj").append(status);
    }
    status.textContent = words;
  }

  // Copies the text of the element that the button names.
  async function copy(button) {
    const text = document.getElementById(button.dataset.bgjobsCopy);
    try {
      await navigator.clipboard.writeText(text.textContent);
      const word = button.firstChild;
      word.data = "Copied";
      announce("Copied");
      setTimeout(() => { word.data = "Copy"; }, 2000);
    } catch {
      getSelection().selectAllChildren(text); // Clipboard not available: select for Ctrl+C.
    }
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-bgjobs-copy]");
    if (button) copy(button);
  });

  // Keys: / focuses the search box, j and k move through the rows, x selects one, r refreshes, ? lists
  // the keys.
  const KEYS = [["/", "go to the search box"], ["j", "next row"], ["k", "previous row"],
    ["x", "select the row"], ["r", "refresh"], ["?", "show these keys"]];
  function moveFocus(step) {
    const rows = [...document.querySelectorAll(".bgj-table tbody tr")];
    const at = rows.findIndex((row) => row.contains(document.activeElement));
    const row = rows[Math.min(Math.max(at + step, 0), rows.length - 1)];
    if (!row) return;
    const link = row.querySelector("a");
    if (!link) row.tabIndex = -1;
    (link || row).focus();
  }
  function showKeys() {
    const template = document.createElement("template");
    template.innerHTML = '<h2 id="bgjobs-keys">Keys</h2><dl class="bgj-facts"></dl>';
    for (const [key, words] of KEYS) {
      const [item, term, text] = ["div", "dt", "dd"].map((name) => document.createElement(name));
      term.append(Object.assign(document.createElement("kbd"), { textContent: key }));
      text.textContent = words;
      item.append(term, text);
      template.content.querySelector("dl").append(item);
    }
    showDialog(template.content.childNodes);
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
    if (!("bgjobs" in root.dataset)) return; // A host's layout may use these keys itself.
    const box = document.activeElement.closest("tr")?.querySelector('[name="id"]');
    const actions = {
      "/": () => document.getElementById("bgjobs-q")?.focus(), j: () => moveFocus(1), k: () => moveFocus(-1),
      x: () => box?.click(), r: () => location.reload(), "?": showKeys,
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  });

  document.addEventListener("DOMContentLoaded", () => {
    if ("bgjobs" in root.dataset) paint();
    document.querySelector("[data-bgjobs-theme]")?.addEventListener("click", toggle);
    const keys = document.querySelector("[data-bgjobs-keys]");
    if (keys) {
      keys.hidden = false;
      keys.addEventListener("click", showKeys);
    }
    updateTimes();
    showLocalTimes();
    document.querySelector('[aria-invalid="true"]')?.focus();
    const live = document.querySelector("[data-bgjobs-live]");
    if (!live) return;
    offerInterval(live);
    schedule(live);
  });
  document.addEventListener("click", (event) => closeMenus(event.target));
})();

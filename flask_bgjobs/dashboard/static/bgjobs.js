// Keeps a page of the dashboard up to date, and its colours as the visitor likes them.
// Every page works without this file.
(() => {
  "use strict";
  const root = document.documentElement;
  const INTERVAL = 5000, LONGEST = 60000;

  // Theme: in our own layout only, a host's page decides for itself. Set before the first paint.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("bgjobs-theme"); } catch { return null; } };
  const theme = () => stored() || (dark.matches ? "dark" : "light");
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
    try { localStorage.setItem("bgjobs-theme", theme() === "dark" ? "light" : "dark"); } catch { return; }
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
  function age(live) {
    const now = Date.now() + ahead;
    for (const time of live.querySelectorAll("time")) {
      const words = relative((Date.parse(time.dateTime) - now) / 1000);
      if (time.textContent !== words) time.textContent = words;
    }
  }

  // Turns `from` into `to` with as few changes as possible, so that focus, typed text and open
  // <details> stay as they are.
  function morph(from, to) {
    if (from.nodeType !== Node.ELEMENT_NODE) {
      if (from.data !== to.data) from.data = to.data;
      return;
    }
    for (const { name } of [...from.attributes]) {
      if (name !== "open" && !to.hasAttribute(name)) from.removeAttribute(name);
    }
    for (const { name, value } of to.attributes) {
      if (name !== "open" && from.getAttribute(name) !== value) from.setAttribute(name, value);
    }
    morphChildren(from, to);
  }
  const alike = (a, b) => a.nodeName === b.nodeName && (a.id || "") === (b.id || "");
  function morphChildren(from, to) {
    const wanted = new Set([...to.children].map((child) => child.id).filter(Boolean));
    let at = from.firstChild;
    for (const child of [...to.childNodes]) {
      // What lies between goes, unless it is still wanted further down.
      let kept = at;
      while (kept && !alike(kept, child) && !wanted.has(kept.id)) kept = kept.nextSibling;
      if (kept && alike(kept, child)) {
        while (at !== kept) at = drop(at);
        at = kept.nextSibling;
        morph(kept, child);
      } else {
        from.insertBefore(child, at);
      }
    }
    while (at) at = drop(at);
  }
  function drop(node) {
    const next = node.nextSibling;
    node.remove();
    return next;
  }

  // Refresh: asks for the changing part of this page, and learns with 304 that nothing changed.
  let etag = null, wait = INTERVAL;
  function isBusy(live) {
    const selection = getSelection();
    return document.hidden || document.querySelector("dialog[open]") ||
      (!selection.isCollapsed && live.contains(selection.anchorNode));
  }
  async function refresh(live) {
    const headers = { "X-Bgjobs-Fragment": "1", ...(etag && { "If-None-Match": etag }) };
    const response = await fetch(location.href, { headers, redirect: "manual", cache: "no-store" });
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
    etag = response.headers.get("ETag");
    const html = await response.text();
    if (isBusy(live)) return void (etag = null);
    // Inside an element, so that leading white space is kept and both sides match.
    const parsed = new DOMParser().parseFromString(`<div>${html}</div>`, "text/html");
    morphChildren(live, parsed.body.firstChild);
  }
  async function turn(live) {
    if (!isBusy(live)) {
      try {
        await refresh(live);
        wait = INTERVAL;
      } catch {
        wait = Math.min(wait * 2, LONGEST);
      }
    }
    age(live);
    setTimeout(turn, wait, live);
  }

  document.addEventListener("DOMContentLoaded", () => {
    if ("bgjobs" in root.dataset) paint();
    document.querySelector("[data-bgjobs-theme]")?.addEventListener("click", toggle);
    const live = document.querySelector("[data-bgjobs-live]");
    if (live) setTimeout(turn, INTERVAL, live);
  });
  document.addEventListener("click", (event) => {
    for (const menu of document.querySelectorAll(".bgj-choice[open]")) {
      if (!menu.contains(event.target)) menu.open = false;
    }
  });
})();

// Prepares a page: renders what pymdownx.arithmatex (generic: true) marks as a formula, and marks short names in the text.
(function () {
  const delimiters = [
    { left: "\\[", right: "\\]", display: true },
    { left: "\\(", right: "\\)", display: false },
  ];
  const SHORT = 24; // characters that fit on the line of a narrow screen

  function prepare(page) {
    for (const formula of page.querySelectorAll(".arithmatex")) {
      renderMathInElement(formula, { delimiters, throwOnError: false });
    }
    // A browser breaks a line after a hyphen, and so between the hyphens of a flag and its name.
    for (const name of page.querySelectorAll(":is(p, li) > code")) {
      name.classList.toggle("short", name.textContent.length <= SHORT);
    }
  }

  // The theme's document$ fires on every page, by instant navigation too.
  if (typeof document$ === "undefined") {
    document.addEventListener("DOMContentLoaded", () => prepare(document));
  } else {
    document$.subscribe(() => prepare(document));
  }
})();

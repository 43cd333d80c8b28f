// The theme: the system's, or the one chosen here, which this browser remembers. Runs before the first paint.
(() => {
  const KEY = "nanoengine.theme";
  const THEMES = ["system", "light", "dark"];
  const remembered = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage may be switched off
    }
  };
  let theme = THEMES.includes(remembered()) ? remembered() : "system";

  function apply() {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme-button");
    if (button) button.textContent = `Theme: ${theme}`;
  }

  apply();
  addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme-button").addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // then it lasts as long as the page
      }
      apply();
      dispatchEvent(new Event("themechange"));
    });
  });
})();

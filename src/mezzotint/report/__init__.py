"""Results as self-contained HTML pages: no network, light and dark, fit for print."""

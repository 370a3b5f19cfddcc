"""Shows a comparison in the terminal, as an HTML page, as charts and as files."""

"""The report of finished or unfinished runs: report.html, figures/ and tables/ beside results.json."""

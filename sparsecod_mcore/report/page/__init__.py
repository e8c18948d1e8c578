"""The HTML report: charts, figures, and the one self-contained page that holds them."""

"""Programs as pictures: what is drawn (``picture``, ``repeats``), where it stands (``layout``), and the SVG (``svg``)."""

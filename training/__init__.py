"""Training and export of encoders. Needs torch; serving never imports this package."""

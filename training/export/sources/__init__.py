"""Where encoders come from: one module for each library, with one function `original` each."""

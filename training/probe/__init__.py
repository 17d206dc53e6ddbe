"""A linear classifier on an encoder's vectors, from the labelled items of a collection. Needs no torch.

labelled.py   items → vectors and labels, and which items were passed over
logistic.py   multinomial logistic regression with L2, by L-BFGS
fitting.py    prototypes or regression, judged on items that were held out
saving.py     the whole of `embedserve train probe`: read, fit, save as a label set
"""

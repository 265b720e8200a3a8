"""Checkpoints of other programs, read: one file a form, each with the layout that it reads and the layer that it makes.

`convert.convert` is what `signbit import` calls; `recognise.open_checkpoint` tells the form by content. A new form is one
file with a `Form` in it and one line in `recognise.FORMS`.
"""

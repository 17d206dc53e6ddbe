"""python -m training.published > docs/published.md"""

from training.published.listing import document

print(document(), end="")

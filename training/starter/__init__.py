"""The starter encoder: what `embedserve serve` uses until one's own is trained.

Two published networks (EfficientNet-Lite0 for ImageNet classes, all-MiniLM-L6-v2 for sentences) are joined,
and two layers learn from captioned drawings what ImageNet's classes lack. An image becomes 640 numbers:

    semantic, 384   ConSE (Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings",
                    ICLR 2014): the network's twenty most probable classes, each standing for the text vector
                    of its description, averaged by probability; joined with what the learned layers say,
                    which counts the more, the less the network is sure of a class
    visual, 256     the network's pooled features, whitened and cut to 256 dimensions, in which pictures that
                    look alike are close

both of unit length, weighted √(1−a) and √a. A text becomes its MiniLM vector and 256 zeros. So the cosine of
a text and an image ranks by meaning alone, and the cosine of two images sees meaning and looks.

    sources.py    the published weights, the tokenizer and the class descriptions
    towers.py     the two networks, pixels and token ids in, unit vectors out
    captioned.py  drawings with captions to learn from, and which of them are kept for measuring
    meaning.py    how the learned layers were fitted (their numbers lie beside, in meaning.npz)
    clipart.py    Open Clip Art, each picture once
    visual.py     how the 256 visual dimensions were fitted (their numbers lie beside, in visual.npz)
    compact.py    ONNX graphs whose weights are stored in 8 or 16 bits and computed with in 32
    build.py      everything together, as an encoder bundle
"""

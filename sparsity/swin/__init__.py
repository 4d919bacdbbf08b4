"""timm's SwinTransformer and SwinTransformerV2 with levels 1 and 2.

In: images, the share of tokens that each selection keeps, the key of each image.
Out: logits, the tokens that are kept, the attention that tokens receive.
Never: changes timm's network or its weights.
"""

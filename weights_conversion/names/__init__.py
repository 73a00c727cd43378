"""The name tables: every tensor of every model under its kdiffusion, CompVis and diffusers name.

A table row names one layer in the three dialects and says what kind of layer it is and how wide:
`"conv3 inputs outputs"` is a 3×3 convolution whose sizes the generator fills in. Where the dialects
store a layer in different forms, both stand there, CompVis first: `"pointwise|dense width width"`.
The generators walk the stages of a model and count; nothing is listed by hand, and no name is ever
made from another one by replacing text. They take the start of the CompVis names, which differs
where a file holds two networks of a kind.
"""

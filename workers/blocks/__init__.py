"""Decoder blocks whose forward and backward pass are written by hand, on the parameters of transformers' own models.

A block as autograd sees it keeps every product's input, normalises in half a dozen kernels and pads rows to the
longest. Here rows stand one behind the other, attention knows where each begins, the low-rank branch rides in the
frozen product, and what is kept for the way back is chosen by the memory that there is. The model, its parameters
and its files stay transformers' and peft's: only how a block computes is swapped, for training steps alone.

`engine` swaps and checks; `families` reads a block; `function` is what autograd sees; `sublayers` hold the
mathematics; `linears`, `attention` and `pointwise` what it is made of, each with a plain version and one for GPUs.
`keeping` chooses what stays for the way back, and `offloading` takes it to the host and back.

Letters of shapes: T tokens of all rows, H hidden, F features between the feed-forward's projections, Q features of
queries, keys and values together, K and N inputs and outputs of a linear layer, R ranks of a group's layers together.
"""

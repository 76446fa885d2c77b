"""From text to batches: `.bin/.idx` files, row order, blending, packing, and the stream the training loop reads.

Text becomes token files in `preprocess` and `chat`; `stream` turns token files into `Batch`es, of which each one is a
pure function of (config, row numbers). Nothing is imported here: the command line must start without torch.
"""

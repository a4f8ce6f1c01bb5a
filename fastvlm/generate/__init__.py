"""The decoding loop of a patched model: greedy, sampling and beam search.

`generate()` hands it to transformers as ``custom_generate`` (`fastvlm.patching.generation`). The
prefill and the first step run through the model; what its forward does to the last states is
written down there (`head`), and steps after it are the stack's program and the head alone
(`steps`). What processors ban is known without scores (`bans`), what ends a row without tensors
(`ends`): a step waits for the device once, and the bookkeeping is Python on a few numbers.
"""

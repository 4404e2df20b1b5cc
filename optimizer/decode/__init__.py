"""Causal language models: prefill and one-token step over shared weights, and ``generate``.

    decoder = gw.optimize_decoder(model, prompt)
    decoder.generate(ids, max_new_tokens=50)
"""

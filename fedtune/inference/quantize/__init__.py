"""Quantize a decoder for the edge: round to nearest, GPTQ, AWQ, and SmoothQuant for 8-bit activations.

    text = calibration(read_texts("my.jsonl"), engine_text.encode)
    for name, tensor in quantize_model(shape, read, Recipe(kind="int4", method="gptq"), text.sequences):
        ...  # a `QuantizedLinear` for each linear's weight, a float32 tensor for the rest, layer after layer
    score = perplexity(of_engine(load_engine(folder)), text.held, window=256)

`model` has the loop over layers, `perplexity` the measurement, and each method has its own file. It needs only the engine's dependencies.
"""

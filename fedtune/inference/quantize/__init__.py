"""Quantize a decoder for the edge: round to nearest, GPTQ, AWQ, and SmoothQuant for 8-bit activations.

    text = make_calibration(read_calibration_texts("my.jsonl"), engine.text.encode)
    for name, tensor in quantize_model(shape, read, QuantizeSettings(kind="int4", method="gptq"), text.sequences):
        ...  # a `QuantizedLinear` for each linear's weight, a float32 tensor for the others, layer by layer
    score = perplexity(of_engine(load_engine(folder)), text.held, window=256)

`model` has the loop over layers, `perplexity` the measurement, and each method its own file. Only the engine's dependencies are needed.
"""

"""The target `genai`: three ONNX graphs with the files by which onnxruntime-genai runs them; see docs/export.md."""

"""``export``: a pruned model as a graph for ONNX Runtime or OpenVINO, for those who cannot take the engine.

onnx and openvino are imported on use.
"""

from token_pruning.integrations.export.files import Format, export

__all__ = ["Format", "export"]

"""Words and pictures to tensors and back: calibration sets, flow, drawing, codecs."""

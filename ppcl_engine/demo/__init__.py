"""The bundled teachers, and `ppcl demo`: the whole method on one of them."""

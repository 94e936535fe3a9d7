"""The bundled teachers' world: captions, rendered pictures, tables, and a reader of what they
show."""

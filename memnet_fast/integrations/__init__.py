"""This package inside other programs. Each module needs its program's package, and is imported by itself."""

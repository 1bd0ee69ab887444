"""Student, positions and teacher."""

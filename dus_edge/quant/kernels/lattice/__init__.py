"""Types whose weights share codes by fours or eights: points of a lattice, found by tables."""

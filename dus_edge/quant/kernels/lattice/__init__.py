"""Types whose weights share codes by fours: points of a lattice, found by tables of neighbours."""

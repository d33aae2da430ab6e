"""Fixed points: states, maps, the loop, and what a solver and a gradient rule must offer. Imports torch only."""

"""One page of HTML for a run or a comparison, with everything in it."""

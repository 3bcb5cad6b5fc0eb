"""The paper's statements as functions: bounds, equalities to leading order, fronts."""

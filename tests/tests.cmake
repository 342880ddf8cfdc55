# Tests that are not gtest cases: checks of the tree, programs run from outside.

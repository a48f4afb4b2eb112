"""Small models, contract suites and fault injectors for tests of Engram and of other backends."""

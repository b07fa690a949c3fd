"""What a user of this package can get wrong."""


class ShardingError(ValueError):
    """A mesh, a rule or a layout that cannot be: says what was expected, what was found, and the remedy."""

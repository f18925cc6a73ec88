"""xFormers' own registry of operators, which ``xformers.info`` lists; mslk's attention operators are not in it."""

OPERATORS_REGISTRY: list[type] = []


def register_operator(operator: type) -> type:
    OPERATORS_REGISTRY.append(operator)
    return operator

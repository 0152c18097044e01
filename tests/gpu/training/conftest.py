from tests.training.conftest import fresh_accelerate  # noqa: F401

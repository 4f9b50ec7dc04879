"""The application: trains both experts, shows the result, exports it. Always run as `-m train`; nothing imports it."""

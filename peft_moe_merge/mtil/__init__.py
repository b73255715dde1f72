"""Everything that measures: data, continual methods, metrics and reports. It knows the library; the library never knows it."""

// Functions for all devices.
#pragma once

#ifdef __CUDACC__
#define SPARSEK_HOST_DEVICE __host__ __device__
#else
#define SPARSEK_HOST_DEVICE
#endif

// A driver of a machine without a GPU: says that there is one of compute capability 9.0, which is what Mosaic GPU's
// compiler asks before it writes machine code. Nothing can be run with it.
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12090; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
// Attributes 75 and 76 are the compute capability's two numbers, 97 the shared memory that a block may have.
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 97 ? 232448 : 0;
  return 0;
}
int cuGetErrorName(int error, const char **name) { *name = "CUDA_STUB"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "there is no GPU"; return 0; }

/* Step LARS over SGD for one tensor on the CPU, float or double: one pass for its two norms, one for its update.

   Addresses are integers from Tensor.data_ptr(). Compiled at install if a C compiler is available; otherwise
   fused_sgd.py uses torch's own kernels. No multiplication is fused with an addition (-ffp-contract=off) and sums
   have a fixed order, so the results are the same on every processor. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <math.h>
#include <stddef.h>

/* One build runs on every x86-64 processor and uses the vector instructions available there. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* Independent partial sums, so that an addition does not wait for the one before it. */
#define LANES 16
/* The number of elements from which releasing the GIL pays off. */
#define RELEASE_GIL_FROM 16384

#define KERNELS(T)                                                                                           \
    FOR_EACH_PROCESSOR                                                                                       \
    static double norm_##T(const T *restrict x, size_t count) {                                              \
        double sums[LANES] = {0}, sum = 0;                                                                   \
        size_t i = 0;                                                                                        \
        for (; i + LANES <= count; i += LANES)                                                               \
            for (int lane = 0; lane < LANES; lane++) sums[lane] += (double)x[i + lane] * (double)x[i + lane]; \
        for (; i < count; i++) sums[i % LANES] += (double)x[i] * (double)x[i];                               \
        for (int lane = 0; lane < LANES; lane++) sum += sums[lane];                                          \
        return sqrt(sum);                                                                                    \
    }                                                                                                        \
    FOR_EACH_PROCESSOR                                                                                       \
    static void plain_##T(T *restrict w, const T *restrict g, size_t count, const Numbers *to) {             \
        const T sign = (T)to->sign, decay = (T)to->decay, rate = (T)(to->lr * to->scale);                    \
        for (size_t i = 0; i < count; i++) w[i] -= rate * (sign * g[i] + decay * w[i]);                      \
    }                                                                                                        \
    FOR_EACH_PROCESSOR                                                                                       \
    static void heavy_ball_##T(T *restrict w, const T *restrict g, T *restrict b, size_t count,              \
                               const Numbers *to) {                                                          \
        const T sign = (T)to->sign, decay = (T)to->decay, lr = (T)to->lr;                                    \
        const T momentum = (T)to->momentum, scale = (T)to->scale;                                            \
        for (size_t i = 0; i < count; i++) {                                                                 \
            b[i] = momentum * b[i] + scale * (sign * g[i] + decay * w[i]);                                   \
            w[i] -= lr * b[i];                                                                               \
        }                                                                                                    \
    }                                                                                                        \
    FOR_EACH_PROCESSOR                                                                                       \
    static void nesterov_##T(T *restrict w, const T *restrict g, T *restrict b, size_t count,                \
                             const Numbers *to) {                                                            \
        const T sign = (T)to->sign, decay = (T)to->decay, lr = (T)to->lr;                                    \
        const T momentum = (T)to->momentum, scale = (T)to->scale;                                            \
        for (size_t i = 0; i < count; i++) {                                                                 \
            const T step = scale * (sign * g[i] + decay * w[i]);                                             \
            b[i] = momentum * b[i] + step;                                                                   \
            w[i] -= lr * (step + momentum * b[i]);                                                           \
        }                                                                                                    \
    }                                                                                                        \
    static void update_##T(T *w, const T *g, T *b, size_t count, int nesterov, const Numbers *to) {          \
        if (!b) plain_##T(w, g, count, to);                                                                  \
        else if (nesterov) nesterov_##T(w, g, b, count, to);                                                 \
        else heavy_ball_##T(w, g, b, count, to);                                                             \
    }

typedef struct {
    double sign, decay, scale, momentum, lr;
} Numbers;

KERNELS(float)
KERNELS(double)

static int check_count(const char *name, Py_ssize_t given, Py_ssize_t takes) {
    if (given != takes) PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", name, takes, given);
    return given == takes;
}

static PyObject *norms(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    if (!check_count("norms", given, 4)) return NULL;
    const void *weight = PyLong_AsVoidPtr(args[0]), *grad = PyLong_AsVoidPtr(args[1]);
    const size_t count = PyLong_AsSize_t(args[2]);
    const int is_double = PyObject_IsTrue(args[3]);
    if (PyErr_Occurred()) return NULL;
    double weight_norm, grad_norm;
    PyThreadState *thread = count < RELEASE_GIL_FROM ? NULL : PyEval_SaveThread();
    weight_norm = is_double ? norm_double(weight, count) : norm_float(weight, count);
    grad_norm = is_double ? norm_double(grad, count) : norm_float(grad, count);
    if (thread) PyEval_RestoreThread(thread);
    return Py_BuildValue("dd", weight_norm, grad_norm);
}

static PyObject *update(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    if (!check_count("update", given, 11)) return NULL;
    void *weight = PyLong_AsVoidPtr(args[0]), *buffer = PyLong_AsVoidPtr(args[2]);
    const void *grad = PyLong_AsVoidPtr(args[1]);
    const size_t count = PyLong_AsSize_t(args[3]);
    const int is_double = PyObject_IsTrue(args[4]), nesterov = PyObject_IsTrue(args[5]);
    const Numbers to = {
        .sign = PyObject_IsTrue(args[6]) ? -1 : 1,
        .decay = PyFloat_AsDouble(args[7]),
        .scale = PyFloat_AsDouble(args[8]),
        .momentum = PyFloat_AsDouble(args[9]),
        .lr = PyFloat_AsDouble(args[10]),
    };
    if (PyErr_Occurred()) return NULL;
    PyThreadState *thread = count < RELEASE_GIL_FROM ? NULL : PyEval_SaveThread();
    if (is_double) update_double(weight, grad, buffer, count, nesterov, &to);
    else update_float(weight, grad, buffer, count, nesterov, &to);
    if (thread) PyEval_RestoreThread(thread);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"norms", (PyCFunction)(void (*)(void))norms, METH_FASTCALL,
     "norms(weight, grad, count, is_double): return (|w|, |g|), summed in double."},
    {"update", (PyCFunction)(void (*)(void))update, METH_FASTCALL,
     "update(weight, grad, buffer, count, is_double, nesterov, maximize, decay, scale, momentum, lr): make a step of\n"
     "SGD with the gradient scale * (g + decay * w), where maximize negates g. buffer 0: no momentum."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "kernels", "LARS over SGD on the CPU, for one tensor.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_kernels(void) {
    return PyModuleDef_Init(&module);
}
